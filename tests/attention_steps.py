"""Steps of an engine as attention backends see them, with decoder rows."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from icarus.vllm import step_layout
from icarus.vllm.step_layout import Batch, DecoderRows


class Step:
    """Requests of (scheduled rows, context, decoder rows), with decoder requests appended.

    ``blocks``: of the cache; each request has up to 40 of them, in any order.
    """

    def __init__(self, *requests: tuple[int, int, int], blocks: int = 160) -> None:
        scheduled, lengths, decoded = (np.array(values, dtype=np.int64) for values in zip(*requests, strict=True))
        starts = np.concatenate([[0], np.cumsum(scheduled)])
        ids = np.where(decoded, 1, 0)
        self.rows: DecoderRows = step_layout.plan(Batch(starts, decoded, ids, decoded > 0))
        whole = np.concatenate([starts, self.rows.ends]).astype(np.int32)
        lengths = np.concatenate([lengths, lengths[self.rows.requests]])
        table = torch.stack([torch.randperm(blocks, dtype=torch.int32)[:40] for _ in requests])
        self.common = CommonAttentionMetadata(
            query_start_loc=torch.from_numpy(whole), query_start_loc_cpu=torch.from_numpy(whole),
            seq_lens=torch.from_numpy(lengths).int(), num_reqs=len(whole) - 1, num_actual_tokens=int(whole[-1]),
            max_query_len=int(scheduled.max()), max_seq_len=int(lengths.max()),
            block_table_tensor=torch.cat([table, table[torch.from_numpy(self.rows.requests)]]),
            slot_mapping=torch.full((int(whole[-1]),), -1),
        )  # fmt: skip
