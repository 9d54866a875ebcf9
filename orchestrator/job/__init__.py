"""From a YAML file and `--set` to a frozen, validated job: the schema, the reader, the checks. No torch."""
