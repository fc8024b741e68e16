"""SGLang's NGRAM worker with other drafts."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from sglang.srt.speculative import ngram_worker
from torch import Tensor

from .drafts import Drafts, named_habits
from .guesses import top_guesses


class MsnWorker(ngram_worker.NGRAMWorker):
    """Verifies as NGRAM does. What it drafts comes from whole texts, and from what the model said
    at every node, instead of from the last tokens alone.
    """

    ngram_corpus: Drafts

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any):
        vocabulary = target_worker.model_runner.model_config.vocab_size
        drafts = partial(Drafts, vocabulary=vocabulary, habits=named_habits())
        # NGRAM's own would be compiled, given its memory and filled in vain.
        with patch.object(ngram_worker, "NgramCorpus", drafts):
            super().__init__(server_args, gpu_id, nccl_port, target_worker)
        # NGRAM passes the ends of the texts: what a pass can add, and a token before.
        self.max_trie_depth = max(self.max_trie_depth, self.draft_token_num + 1)
        self._guesses: Tensor | None = None  # of the last pass, on its way to the host

    def _prepare_draft_tokens(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        if self._guesses is not None:
            self.ngram_corpus.remember(self._guesses.cpu())  # waits, as NGRAM does right below
            self._guesses = None
        for req in batch.reqs:
            if req.rid not in self.ngram_corpus:
                self.ngram_corpus.open(req.rid, req.origin_input_ids_unpadded, req.output_ids)
        return super()._prepare_draft_tokens(batch)

    def forward_batch_generation(self, batch: Any, *arguments: Any, **named: Any) -> Any:
        drafted = batch.forward_mode.is_decode()
        result = super().forward_batch_generation(batch, *arguments, **named)
        logits = getattr(result.logits_output, "next_token_logits", None)
        if drafted and logits is not None and len(batch.reqs):
            self._guesses = top_guesses(logits.view(len(batch.reqs), self.draft_token_num, -1))
        return result
