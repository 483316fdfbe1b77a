"""Measurements of fixed points and of the memory inside them: functions of plain maps and arrays.

The suites `equilibrium`, `energy_landscape`, `associative_recall` and `continual` are made of them.
All but `system` and `lessons` know nothing of a model: they take any map with a fixed point.
"""
