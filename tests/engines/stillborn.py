"""A child process that dies before it reads its task."""

raise SystemExit(3)
