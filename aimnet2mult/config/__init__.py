"""Modules and models from dotted names and YAML files; the default configurations."""

from aimnet2mult.config.builder import build_module, load_yaml

__all__ = ["build_module", "load_yaml"]
