"""The pictures of the documentation, each from a real run.

    python docs/make_pictures.py [NAME…]     # in the repository's root; all of them without names, into docs/images/

It needs Chromium and Pillow, and Prometheus for its own picture. It starts a Ray and a conductor of its own on a slice of RAM,
and ends them. What would show this machine (paths, its name) is left out of the frame; nothing is painted over.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_metrics_report_interval_ms="1000")

from pictures import company, programs, prometheus, ray_dashboard, watching

IMAGES = Path(__file__).with_name("images")
#: of one conductor while agents talk, in this order
AT_WORK = {
    "board.png": watching.board,
    "top.svg": watching.top,
    "notebook.png": watching.status,
    "ray-dashboard.png": ray_dashboard.actors,
    "ray-placement-groups.png": ray_dashboard.placement_groups,
    "prometheus.png": prometheus.graphs,
}
#: with a Ray of its own
ALONE = {"demo.svg": programs.demo, "stream-demo.png": programs.stream_demo}


def main(names: list[str]) -> None:
    wanted = names or [*ALONE, *AT_WORK]
    if unknown := set(wanted) - {*ALONE, *AT_WORK}:
        sys.exit(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join([*ALONE, *AT_WORK])}")
    IMAGES.mkdir(exist_ok=True)
    for name, make in ALONE.items():
        if name in wanted:
            make(IMAGES / name)
    if at_work := {name: take for name, take in AT_WORK.items() if name in wanted}:
        with company.at_work() as scene:
            for name, take in at_work.items():
                asyncio.run(take(scene, IMAGES / name))


if __name__ == "__main__":
    main(sys.argv[1:])
