"""The commands, a file for each kind. They import what they need when they run: ``dipgo --help`` is instant."""
