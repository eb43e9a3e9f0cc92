"""Version: the one place that names it; pyproject.toml reads it from here."""

__version__ = "1.0.0.dev0"
