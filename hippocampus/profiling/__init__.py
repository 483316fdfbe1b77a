"""Where a training step spends its time: traces, and the table of components made from one."""
