"""What is computed at which step, and what is served instead: schedules by rule, and the SubNet that holds one."""
