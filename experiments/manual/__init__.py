"""The documentation site: what its pages read off the code, and what mkdocs makes of them."""
