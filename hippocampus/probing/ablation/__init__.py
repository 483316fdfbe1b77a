"""Models trained beside each other, with what their differences are worth: `hippocampus.ablate`.

`grid` says which models, `matching` makes them as large or as costly as the whole one, `cells`
trains what is not trained yet, `runs` reads the run folders, `statistics`, `progress` and
`scaling` compute, `knockout` probes the whole model without its paths, `tables` and `pictures`
show, `study` is all of it in order.
"""
