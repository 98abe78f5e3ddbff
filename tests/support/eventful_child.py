"""`python -m tests.support.eventful_child CONFIG SECONDS`: the service's conductor lives through everything, again and again.

For so long; prints how many tokens were generated. For tests of the command line, which have no Ray of their own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from conductor.config import load_config
from tests.support.conducting import Conductor
from tests.support.eventful import live_through_everything


def main() -> None:
    config, until = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    conductor, generated = Conductor(load_config(config)), 0
    while time.monotonic() < until:
        generated += live_through_everything(conductor, config.parent / "kv")
        for agent in conductor.call("list"):
            conductor.call("unregister", agent.id)
    print(generated)


if __name__ == "__main__":
    main()
