"""A device's side: notes the time, and sends back what it got."""

import sys
import time
from pathlib import Path

import nvflare.client as flare


def main() -> None:
    flare.init()
    while flare.is_running():
        model = flare.receive()
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{flare.get_site_name()} {time.time()}\n")
        flare.send(flare.FLModel(params=model.params, params_type=model.params_type))


main()
