"""What each memory does: interventions, mechanism views, ablations, the report."""
