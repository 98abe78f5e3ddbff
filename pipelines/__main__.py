"""`python -m pipelines` is `conductor`, where the package is on the path but not installed."""

from pipelines.cli import main

main()
