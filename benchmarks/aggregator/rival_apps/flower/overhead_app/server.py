"""The server's side: FedAvg over arrays of zeros, all nodes every round, no evaluation."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    count = int(config["arrays"])
    size = round(float(config["megabytes"]) * 1e6 / 4 / count)
    arrays = ArrayRecord([np.zeros(size, np.float32) for _ in range(count)])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(config["rounds"]))
