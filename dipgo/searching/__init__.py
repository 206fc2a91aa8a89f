"""The search: fixed policies, the pruner, post-processing, learned backups, and the procedure that joins them."""
