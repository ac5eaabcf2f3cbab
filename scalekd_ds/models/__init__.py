"""Builds timm models by name, and loads weights into them from any trainer's file or from one with a JSON card.

May use `errors`, and nothing else of the package.
"""
