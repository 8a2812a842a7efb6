"""Placeholder until the dashboard lands."""

from fastapi import FastAPI


def mount_dashboard(web: FastAPI) -> None:
    """Add the dashboard's pages to the application."""
