from __future__ import annotations

import numpy as np

from course_lib.data.collate import examples_of_pack, flatten, pad
from course_lib.data.packing import plan_packs
from course_lib.data.tokenize import IGNORE_INDEX, Example

EXAMPLES = [Example([1, 2, 3], [IGNORE_INDEX, 2, 3]), Example([4, 5], [4, 5])]


def test_flat_rows_restart_positions_and_never_train_a_first_token() -> None:
    batch = flatten(EXAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == 3


def test_without_isolation_positions_run_on_and_one_segment_holds_all() -> None:
    batch = flatten(EXAMPLES, isolate=False)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3, 4, 5]]  # 4 is predicted from another sample
    assert batch["cu_seq_lens_q"].tolist() == [0, 5]
    assert batch["max_length_q"] == 5


def test_a_pack_is_collated_with_the_segments_of_its_plan() -> None:
    examples = [Example(list(range(start, start + 5)), list(range(start, start + 5))) for start in (10, 20, 30)]
    for strategy in ("none", "concat", "best-fit"):
        plan = plan_packs([5, 5, 5], max_length=12, strategy=strategy)
        for pack in range(len(plan)):
            batch = flatten(examples_of_pack(plan, pack, examples))
            tokens = [
                token
                for piece in plan[pack]
                for token in examples[piece.example].input_ids[piece.start :][: piece.length]
            ]
            assert batch["input_ids"].tolist() == [tokens]
            assert np.array_equal(batch["cu_seq_lens_q"], plan.segment_edges(pack))
            assert (batch["position_ids"] == 0).sum() == len(plan.segment_edges(pack)) - 1


def test_padding_is_masked_by_length_even_where_pad_is_the_end_token() -> None:
    end = 5  # also the pad id: a mask made from ids would hide the trained end of the second row
    batch = pad(EXAMPLES, pad_token_id=end)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3], [IGNORE_INDEX, 5, IGNORE_INDEX]]


def test_trained_tokens_counts_what_the_loss_sees() -> None:
    assert [example.trained_tokens for example in EXAMPLES] == [2, 1]
