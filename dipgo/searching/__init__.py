"""The search: fixed schedules, the pruner, learned backups, and the procedure that joins them."""
