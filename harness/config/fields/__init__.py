"""The fields of each group of the config. Nothing here imports torch."""
