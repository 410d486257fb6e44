"""TRL's trainer on the same model and token batches: a side of gpu_training.py, where TRL is installed."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch


def train_with_trl(
    model: Any, batches: list[torch.Tensor], more: list[str], *, warm_up: int, liger: bool
) -> tuple[list[list[float]], float, int]:
    """SFTTrainer as it comes, with 8-bit AdamW and bfloat16; with `liger`, its fused kernels too.

    Returns:
        Loss and gradient norm of each step, the seconds of the steps after the warm-up, and the bytes allocated before them.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = torch.cat(batches).tolist()
    started = []

    class Clock(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            if state.global_step == warm_up:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                started.extend((time.perf_counter(), torch.cuda.memory_allocated()))

    names = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            max_steps=len(batches),
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_8bit",
            bf16=torch.cuda.is_available(),
            gradient_checkpointing="checkpoint" in more,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=liger,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=names, pad_token="<pad>", eos_token="<eos>"),
            callbacks=[Clock()],
        )
        trainer.train()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started[0]
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [[entry["loss"], entry["grad_norm"]] for entry in steps], seconds, started[1]
