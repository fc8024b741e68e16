"""Training in several processes: a script for torch.distributed.run, and what each of them does.

python -m torch.distributed.run … several_processes.py FOLDER [--fsdp] LAYOUT …
"""

import os
import sys

import torch
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

import msn_ext
from helpers.families import VOCAB, tiny_model
from helpers.samples import Pad, samples
from helpers.trainers import with_adapter


def model_for(layout: str):
    """The model that is trained with noise in this layout, or by a gate."""
    return with_adapter() if layout == "gate" else tiny_model("llama", 1, torch.float32)


def shard(trainer) -> None:
    """Have a trainer shard its model by FSDP, which accelerate itself does on no CPU."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    state = vars(trainer.accelerator.state)
    state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    trainer.is_fsdp_enabled = True


def learn(folder, layout: str, processes: int = 1, fsdp: bool = False) -> tuple[dict, list]:
    """Return the weights after two passes over 24 samples, four of them in a step, and the log.

    Args:
        layout: of the noise, or "gate".
    """
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4 // processes,
        num_train_epochs=2,
        learning_rate=1e-3,
        seed=3,
        logging_steps=1,
        max_grad_norm=1e9,
    )
    rows = samples(24, VOCAB)
    model = model_for(layout)
    trainer = transformers.Trainer(
        model, settings, Pad(), train_dataset=rows, eval_dataset=rows[:8]
    )
    if fsdp:
        shard(trainer)
    noise = dict(gate=True) if layout == "gate" else dict(layout=layout)
    msn_ext.add_noise(trainer, **noise, segments=2, seed=1)
    trainer.train()
    assert fsdp == any(isinstance(x, DTensor) for x in trainer.model_wrapped.parameters())
    state = {
        name: x.full_tensor() if isinstance(x, DTensor) else x
        for name, x in trainer.model.state_dict().items()
    }
    return {name: x.cpu() for name, x in state.items()}, trainer.state.log_history


def main(folder: str, *layouts: str) -> None:
    torch.set_num_threads(1)
    fsdp, layouts = "--fsdp" in layouts, [name for name in layouts if name != "--fsdp"]
    for layout in layouts:
        learned = learn(folder, layout, int(os.environ["WORLD_SIZE"]), fsdp)
        if torch.distributed.get_rank() == 0:
            torch.save(learned, f"{folder}/{layout}.pt")
    # A process that leaves while another one still talks to it may abort that one.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Threads of torch's that ask for the interpreter while it goes down abort the process.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
