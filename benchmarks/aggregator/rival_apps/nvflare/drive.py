"""Runs FedAvg over zeros in a POC deployment: ``drive.py FOLDER MEGABYTES ARRAYS ROUNDS POLL_S LONGEST_S``.

``POLL_S``: how often clients ask for work and the controller looks; 0: as NVFlare has it.
"""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import PocEnv


def main() -> None:
    folder = Path(sys.argv[1])
    megabytes, count, rounds, poll, longest = map(float, sys.argv[2:])
    size = round(megabytes * 1e6 / 4 / count)
    np.save(folder / "model.npy", np.zeros((int(count), size), np.float32))

    class Recipe(NumpyFedAvgRecipe):
        def _get_controller_kwargs(self) -> dict[str, float]:
            return {"task_check_period": poll} if poll else {}

    recipe = Recipe(
        name="overhead",
        initial_ckpt=str(folder / "model.npy"),
        min_clients=2,
        num_rounds=int(rounds),
        train_script=str(Path(__file__).with_name("client.py")),
        train_args=str(folder / "times"),
    )
    if poll:
        recipe.add_server_config({"server": {"task_request_interval": poll}})
    environment = PocEnv(num_clients=2)
    try:
        run = recipe.run(environment)
        run.get_result(timeout=longest)
        print("ended as", run.get_status())
    finally:
        environment.stop(clean_up=True)


main()
