"""What the arguments of a model of transformers say about its tokens."""

from types import SimpleNamespace

import torch

from mixture_of_experts.huggingface.model_arguments import count_seen_tokens, read_token_metadata


def test_layer_type_mask_covers_current_and_cached_tokens():
    """A model of sliding windows alone, one step behind two cached tokens, of which one is padding in sequence 0."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    given = {"input_ids": torch.zeros(2, 1, dtype=torch.int64), "attention_mask": {"sliding_attention": mask}}
    given["past_key_values"] = SimpleNamespace(get_seq_length=lambda: 2)
    assert count_seen_tokens(given).tolist() == [1, 2]
    assert read_token_metadata(given).mask.tolist() == [[True], [False]]


def test_a_decoded_step_without_padding_has_no_mask():
    """`generate` gives a mask of ones with every step; a sequence that ended has a 0."""
    ids, ones = torch.ones(2, 1, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    assert read_token_metadata({"input_ids": ids, "attention_mask": ones}).mask is None
    ones[1, -1] = 0
    assert read_token_metadata({"input_ids": ids, "attention_mask": ones}).mask.tolist() == [[True], [False]]
    assert read_token_metadata({"input_ids": ids.expand(2, 5), "attention_mask": torch.ones(2, 5)}).mask.all()


def test_sliding_mask_of_a_full_cache():
    """It omits the first tokens, so earlier tokens cannot be counted, but the diagonal still shows new padding."""
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool)
    mask[0, 0, 1, 5] = False
    given = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": mask}
    given["past_key_values"] = SimpleNamespace(get_seq_length=lambda: 10)
    assert count_seen_tokens(given) is None
    assert read_token_metadata(given).mask.tolist() == [[True, False, True], [True, True, True]]


def test_padding_of_packed_rows():
    """A collator gives each padding token a position of 0. A lone token, or one unlike the last, may be a document."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 0, 0]])
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 9, 9], [4, 5, 6, 7, 8, 9, 9, 9], [3, 4, 5, 6, 7, 8, 8, 9]])
    found = read_token_metadata({"input_ids": ids, "position_ids": positions})
    assert found.segment_ids is not None
    assert found.mask.tolist() == [[True] * 5 + [False] * 3, [True] * 8, [True] * 8]
    found = read_token_metadata({"input_ids": ids[1:], "position_ids": positions[1:]})
    assert found.segment_ids is not None
    assert found.mask is None
