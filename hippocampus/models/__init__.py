"""Language models built from `layers/`: one file a family, and `build_model` to choose."""
