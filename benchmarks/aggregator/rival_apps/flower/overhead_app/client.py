"""A device's side: notes the time, and sends back what it got."""

import time
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    with Path(str(context.run_config["log"])).open("a") as file:
        file.write(f"{context.node_id} {time.time()}\n")
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
