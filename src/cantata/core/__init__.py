"""What every part stands on: types, errors, config, build, processes, logs and files."""
