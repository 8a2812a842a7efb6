import torch

from local_engine.pages import on_large_pages, zeros

PAGE = 2 << 20


def test_copies_keep_their_own_values() -> None:
    given = [torch.full((3, side), float(side)).t() for side in (1, 700, 200_000, 9_000_000, 5)]
    held = [on_large_pages(tensor) for tensor in given]
    for tensor in held:
        tensor += 1  # to another's memory, if they shared any
    for before, after in zip(given, held, strict=True):
        assert after.is_contiguous()
        assert torch.equal(after, before + 1)


def test_what_fills_a_page_begins_with_one_and_holds_zeros() -> None:
    for shape in ((2, 3), (2, 5, 4, 256, 64)):
        tensor = zeros(shape, torch.bfloat16)
        assert tensor.shape == shape
        assert tensor.dtype == torch.bfloat16
        assert not tensor.any()
        assert tensor.nbytes < PAGE or tensor.data_ptr() % PAGE == 0


def test_memory_first_asked_for_in_inference_mode_is_written_outside() -> None:
    with torch.inference_mode():
        on_large_pages(torch.ones(9_000_000))  # more than any arena has left
    assert on_large_pages(torch.ones(3)).sum() == 3
