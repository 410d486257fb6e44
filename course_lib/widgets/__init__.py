"""Notebook widgets: inline assets, no network, and a static HTML twin in the saved notebook."""
