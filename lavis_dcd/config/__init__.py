"""A YAML file, checked: the job file, its faults, the files that it needs, and the ``run:`` section."""
