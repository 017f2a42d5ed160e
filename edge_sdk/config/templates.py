"""The commented config files that ``init`` writes: every key is there, with what it costs.

A key that is commented out stands with its default, or with an example where its default is "none".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

__all__ = ["agent_toml", "run_toml"]


def agent_toml(
    *,
    id: str = "device-1",
    broker_url: str = "mqtt://127.0.0.1:1883",
    base: str = "sentence-transformers/all-MiniLM-L6-v2",
    data: str = "train.jsonl",
) -> str:
    """Text of an ``agent.toml``. It loads as soon as the file of rows is there."""
    return _fill(_AGENT, ID=id, URL=broker_url, BASE=base, DATA=data)


def run_toml(
    *,
    name: str = "my-run",
    labels: Sequence[str] = ("negative", "positive"),
    base: str = "sentence-transformers/all-MiniLM-L6-v2",
    data: str = "held-out.jsonl",
) -> str:
    """Text of a ``run.toml``. It loads as soon as the file of held-out rows is there."""
    return _fill(_RUN, NAME=name, LABELS=list(labels), BASE=base, DATA=data)


def _fill(template: str, **values: str | list[str]) -> str:
    # A JSON string, or list of strings, is a TOML one too, save for DEL, which JSON leaves as it is.
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return re.sub("<([A-Z]+)>", lambda found: texts[found[1]].replace("\x7f", "\\u007f"), template)


_BROKER_EXTRAS = """\
# namespace = "edge"       # first level of all topics; runs that share a broker need one each
# username = "device-1"    # with password_file; the password itself never stands in this file
# password_file = "password.txt"
# insecure = false         # true allows mqtt:// off this machine: all travels readable, the password too

# [broker.tls]             # for mqtts://; without ca the authorities that the system trusts
# ca = "ca.pem"
# cert = "client.pem"      # cert and key: where the broker asks for a certificate of its clients
# key = "client.key"
"""

_AGENT = (
    """\
# agent.toml: who this device is, and where things lie on it. What changes the mathematics stands in the
# server's run.toml. Paths are relative to this file. `edge-agent run --config agent.toml` reads it.

[agent]
# letters, digits, _ and -; unique in the run
id = <ID>
# device_class = "jetson-orin-nano-8gb"  # one of `edge-agent device-classes`; only a name for people
# emulated = false         # true: this machine only plays that class, by the limits below
# state_dir = "state"      # what must outlive a crash: choices, updates on their way, adapters
# idle_unload_s = 300      # the trainer ends after so long without work; lower gives memory back sooner,
#                          # but the next round loads the base model again (seconds to a minute)

[broker]
# what `edge-aggregator run` prints; mqtts:// off this machine
url = <URL>
"""
    + _BROKER_EXTRAS
    + """
[base]
# folder with config.json, the weights as safetensors, and the tokenizer; or a hub id
path = <BASE>

[data]
# .jsonl, .csv or .parquet (the extra "parquet"); read on this device alone, and checked at every start
path = <DATA>
# text = "text"            # the column with the text
# label = "label"          # classification: the column with the label, one of run.labels
# prompt = "prompt"        # causal-lm: prompt and response, where the file has both; only the response is
# response = "response"    # learnt. A file with neither of these nor messages: text, all of it
# messages = "messages"    # causal-lm: chats, lists of {role, content}; the assistant's turns are learnt

[trainer]
# device = "auto"          # auto, cpu, cuda, cuda:1; auto takes CUDA where it works
# threads = 0              # 0: as many as torch likes; fewer leave the machine usable, and train slower
# allocator = "auto"       # of its memory: mimalloc, tcmalloc, jemalloc, glibc; auto takes glibc
#                          # under limits.memory_mb, since it holds least, else the quickest there is
# base_precision = "fp32"  # what the frozen base is held in: bf16, fp16 take half of fp32's memory, int8 a
#                          # quarter, nf4 an eighth, int2 a fifteenth; below 8 bits the model gets worse
# base_plan = "plan.json"  # instead: bits for each block within a budget, as `edge-agent quantize-base` plans

[limits]
# memory_mb = 2000         # what the trainer process may hold in all (10^6 bytes), enforced. Less memory:
#                          # fewer layers tuned, or more of their activations quantized (some more time)
# uplink_kbps = 1000       # kilobit per second that the agent may send; a slow link makes rounds longer,
#                          # or the device choose a smaller update
# link_probe_mb = 1.0      # what may go over the link to measure it, both ways: at joining, and again when a
#                          # day old; 0: the first rounds are planned as if the link were free
# prefix_cache_mb = 0      # room to keep what the frozen layers give, over the epochs of a round: rows seen
#                          # again then skip them, which saves most of a step where few layers are tuned
# prefix_cache = "memory"  # memory (part of memory_mb) or disk

[gates]
# when this device may work; the server is told why it does not. A gate that closes interrupts the training
# within a step; it begins anew once the gate opens, if the round's deadline allows: that costs its time twice
# min_battery_percent = 30 # on battery and below it: no work, and rounds go on without this device
# ac_only = false          # true: no work on battery at all
# battery_training_s = 120 # on battery: train at most so long a round, so fewer layers are tuned
# max_temperature_c = 80   # hottest sensor above it: no work until it has cooled down by the margin
# temperature_margin_c = 5 # small: training starts and stops often; large: it stands still for longer
# quiet_hours = ["22:00-07:00"]  # local time; nothing is computed then, several windows may be given
# traffic_mb_per_day = 500 # both ways (10^6 bytes): a smaller update is chosen, or the round left out, and an
#                          # update that waits until tomorrow counts for less when it comes
# check_s = 10             # how often gates are looked at; longer wakes less often and notices later
"""
)

_RUN = (
    """\
# run.toml: everything that changes the mathematics of a run, and where the server lives. What belongs to a
# device stands in its agent.toml. Paths are relative to this file. `edge-aggregator run --config run.toml`.

[run]
# letters, digits, _ and -
name = <NAME>
# every label of the data, in the order of the head's outputs; a causal LM has none: take the line out
labels = <LABELS>
# method = "fedquad"       # fedquad: each device gets what fits it; fedavg: all layers on every device, in
#                          # fp32: the most memory and traffic; or your own, "package.module:name"
# task = "classification"  # or "causal-lm": the model goes on writing text; its head stays as it is
# template = "{text}"      # how a row becomes the model's input; causal-lm: "{prompt}\\n{response}", or what
#                          # else stands around the two; texts without a prompt, and chats, do without it
# seed = 0                 # the same seed, config and devices give the same adapter
# state_dir = "server-state"  # versions, updates and rounds; a restarted server goes on from here; never an
#                          # agent's folder

[base]
# folder or hub id; every device needs the same weights
path = <BASE>
# layers = "model.layers"  # the list of transformer layers, where it is not found by itself

[broker]
# url = "embedded"         # the server's own broker, on this machine only ("embedded:1883" for a fixed
#                          # port); or another one, mqtts://host:8883
"""
    + _BROKER_EXTRAS.replace('"device-1"  ', '"aggregator"')
    + """
[lora]
# rank = 8                 # updates, and the memory and time to make them, grow with it
# alpha = 16.0             # LoRA's product is scaled by alpha / rank
# targets = ["all-linear"] # or modules by name, "attention.self.query" say: fewer are smaller and learn less

[training]
# steps = 25               # per device and round: more steps, fewer rounds, but devices drift apart
# batch = 16               # rows a step; activation memory grows in step with it
# max_length = 128         # tokens a row, the rest is cut; memory and time grow with it, attention faster
# accumulation = 1         # batches a step: a larger batch in the memory of one
# optimizer = "adamw"      # adamw keeps 8 bytes per trained value, adamw8bit 2 (paged-adamw8bit: on GPUs,
#                          # by bitsandbytes), sgd none, and it needs other rates
# factors = "AB"           # "B" freezes A (LoRA-FA): less activation memory, half the trained values
# learning_rate = 2e-3     # for LoRA
# head_learning_rate = 1e-2  # for the task head, which starts from nothing: about five times LoRA's
# weight_decay = 0.0
# clip_norm = 1.0          # longest gradient
# warmup_steps = 0         # steps of a round over which the rate rises
# schedule = "constant"    # after the warm-up; linear: falling towards 0 at the end of each round
# prefix_form = "exact"    # how devices may keep what frozen layers give: fp16 and int8 take less room
#                          # (see limits.prefix_cache_mb), and round it

[rounds]
# total = 10               # a round in which nobody delivered counts too
# min_devices = 1          # a round waits until so many are there and ready
# deadline_s = 600         # by default from the devices' own predictions; shorter drops slow devices
# linger_s = 30            # after the last round, how long to wait for devices to fetch the result
# schedule = "synchronous" # "buffered": work for whoever is free, and a merge whenever enough arrived; nobody
#                          # waits for anybody, and updates build on older versions. By default the method's
# buffer = 10              # buffered: updates to a merge; more are steadier, fewer are fresher
# selection = "uniform"    # all, uniform (drawn by the seed) or utility (whose loss is high and who is fast)
# devices_per_round = 10   # a count, or a share such as 0.1; by default all that are ready
# over_select = 1.0        # 1.3: a third more are offered work, as some will not deliver
# quorum = 1.0             # share of devices_per_round whose updates close a round before its deadline; below
#                          # 1 nobody waits for the slowest
# late = "merge"           # what comes after its round counts in a later one, by its staleness; "refuse"
#                          # leaves it to the device, which adds it to its next update
# max_staleness = 10       # versions that may have been made since; what is older is refused
# max_samples = 1000000    # a device that says it has more rows is refused: it would outweigh all others

[merge]
# rule = "layer-mean"      # how updates become the next version; rank-one, product-svd (exact products, slow
#                          # for wide models), stacking (base in fp32 or 16 bits); see docs/merging.md
# server_optimizer = "none"  # fedavgm, fedadam: go along the merged change with momentum; they keep one and
#                          # two values a parameter on the server
# server_learning_rate = 1.0  # of the server optimizer, as the next three; by default its own
# momentum = 0.9
# second_moment = 0.99     # of fedadam
# adaptivity = 1e-3        # of fedadam
# full_every = 8           # every so many versions a full one, at 16 bits; the others travel as 8-bit deltas.
#                          # More: less traffic, but a device that was away fetches a longer chain

[evaluation]               # take this section out to run without
# every = 1                # rounds between evaluations, which the server computes itself

[evaluation.data]
# held-out rows, .jsonl, .csv or .parquet
path = <DATA>
# text = "text"            # columns as in agent.toml
# label = "label"
# prompt = "prompt"
# response = "response"
# messages = "messages"

[transfer]
# chunk_kib = 256          # 1 to 256; smaller loses less on a bad link, and costs more acknowledgements
# window = 4               # chunks on their way at once; at most so many are sent again after a cut
# max_update_mb = 256      # a larger update is refused

[trainer]                  # where the server evaluates
# device = "auto"
# threads = 0
# allocator = "auto"       # of its memory, as in agent.toml
# base_precision = "fp32"  # as in agent.toml; what devices hold is their own affair
# base_plan = "plan.json"

[storage]
# keep_free_mb = 100       # below so much room (10^6 bytes) on state_dir's disk the rounds pause, and devices
#                          # keep what they have, until there is more
# keep_versions = false    # true: the files of all versions; else those that nobody needs any more go

[metrics]
# listen = "127.0.0.1:9464"  # where Prometheus reads metrics, in plain HTTP and without a password: keep it
#                          # on loopback, or behind what guards it. By default nothing listens
"""
)
