"""The ClientApp of a Flower app as it is usually written: model and adapters are built anew for every message.

peft's LoRA, state dicts as they are, a train and an evaluate message a round. The images are opened once a process, as
quickstarts do it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn import functional as F

from experiments.bench.setting import Setting
from tapfl.seeds import numpy_generator
from tapfl.training import accuracy, batches, optimizer, predict

TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"

app = ClientApp()


@lru_cache(maxsize=1)
def setting_of(file: str) -> Setting:
    """Returns the federation, kept for its images."""
    return Setting.read(Path(file))


def build(setting: Setting) -> PeftModel:
    """Returns the backbone from its file, with adapters as peft makes them."""
    options = LoraConfig(
        r=setting.rank,
        lora_alpha=round(setting.config.adapters.scale * setting.rank),
        target_modules=TARGETS,
        modules_to_save=["head"],
    )
    return get_peft_model(setting.dense(), options)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains on what arrived."""
    setting, device = setting_of(str(context.run_config["config"])), int(context.node_config["partition-id"])
    model, options = build(setting), setting.config.train
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    inputs, labels = setting.part(device, "train")
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = optimizer(options.optimizer, trained, options.learning_rate)
    round = int(str(message.content.config_records["config"]["server-round"]))
    order = numpy_generator(setting.config.seed, "train", round, device)
    losses = []
    for batch in batches(len(labels), options.batch, options.epochs, order):
        index = torch.from_numpy(batch)
        loss = F.cross_entropy(model(inputs[index]), labels[index])
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    metrics = MetricRecord({"loss": sum(losses) / len(losses), "num-examples": len(labels)})
    arrays = ArrayRecord(dict(get_peft_model_state_dict(model)))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates what arrived."""
    setting, device = setting_of(str(context.run_config["config"])), int(context.node_config["partition-id"])
    model = build(setting).eval()
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    inputs, labels = setting.part(device, "test")
    metrics = MetricRecord({"accuracy": accuracy(predict(model, inputs), labels), "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
