"""amqtt as a process of its own: ``python -m aggregator.broker.amqtt_process HOST PORT``.

For small fleets on one machine where no Mosquitto is installed. MQTT 3.1.1, everything in memory.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from amqtt.broker import Broker

_PLUGINS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}


async def serve(host: str, port: int) -> None:
    """Runs until a signal to end arrives."""
    broker = Broker(
        {"listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}}, "plugins": _PLUGINS}
    )
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, ended.set)
    await broker.start()
    sys.stderr.write("amqtt running\n")
    sys.stderr.flush()
    await ended.wait()
    await broker.shutdown()


def main() -> None:
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    host, port = sys.argv[1:3]
    asyncio.run(serve(host, int(port)))


if __name__ == "__main__":
    main()
