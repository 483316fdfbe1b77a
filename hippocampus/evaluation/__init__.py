"""What a number is compared with, and how it is measured."""
