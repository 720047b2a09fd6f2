"""Modules and models from dotted names and YAML files; the default configurations."""
