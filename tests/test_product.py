"""The packed matrix product on CPU, against float64; and that a row's bits are its own."""

import ctypes

import pytest
import torch

import polyshard as ps
from polyshard.native import build
from polyshard.native.build import KINDS
from polyshard.native.matmul import SOURCE, PackedProduct, unsupported_reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, inputs, outputs: of one tile, of parts of tiles and panels, of several depths and blocks
SIZES = ((1, 7, 5), (3, 64, 33), (16, 576, 960), (13, 257, 64), (600, 1536, 100), (150, 4100, 31), (0, 8, 8))

LACKS = unsupported_reason(torch.float32) or ""  # what does not compile is no reason to skip
pytestmark = pytest.mark.skipif(LACKS.startswith("needs"), reason=f"the product {LACKS}")


def tensors(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    make = [torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (outputs,))]
    x, weight, bias = (t.to(dtype) for t in make)
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_product_in_float64_rounded(sizes, dtype):
    x, weight, bias = tensors(*sizes, dtype)
    wide = x.double() @ weight.double().t()
    # Float32 sums: the bound of a sum of `inputs` products, which are rounded once more on the way out.
    bound = torch.finfo(torch.float32).eps * sizes[1] ** 0.5 * (x.double().abs() @ weight.double().abs().t())
    for added in (None, bias):
        expected = wide if added is None else wide + added.double()
        got = PackedProduct(weight)(x, added)
        assert got.dtype == dtype
        assert got.shape == expected.shape
        rounding = torch.finfo(dtype).eps / 2 * expected.abs()
        assert ((got.double() - expected).abs() <= bound + 1.01 * rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_batch_shard_or_threads(dtype):
    x, weight, bias = tensors(300, 1100, 200, dtype)
    whole = PackedProduct(weight)(x, bias)
    for first, last in ((0, 1), (7, 9), (3, 20), (44, 300)):
        assert torch.equal(PackedProduct(weight)(x[first:last], bias), whole[first:last])
    for first, last in ((0, 100), (100, 200), (17, 18)):
        assert torch.equal(PackedProduct(weight[first:last])(x, bias[first:last]), whole[:, first:last])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(PackedProduct(weight)(x, bias), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_where_they_lie(dtype):
    x, weight, _ = tensors(40, 96, 48, dtype)
    expected = PackedProduct(weight)(x)
    beside = torch.cat((x, torch.full_like(x, torch.nan)), dim=1)[:, :96]
    assert torch.equal(PackedProduct(weight)(beside), expected)
    assert torch.equal(PackedProduct(weight.t().contiguous().t())(x.t().contiguous().t()), expected)
    assert torch.equal(PackedProduct(weight)(x.view(2, 4, 5, 96)), expected.view(2, 4, 5, 48))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 7, 6), (40, 64, 66), (300, 576, 192), (13, 1100, 70), (0, 8, 8)], ids=str)
def test_a_gated_product_has_the_bits_of_the_activation_of_the_whole(sizes, dtype):
    x, weight, bias = tensors(*sizes, dtype)
    gated = PackedProduct(weight, gated=True)
    for added in (None, bias):
        whole = PackedProduct(weight)(x, added)
        assert torch.equal(gated(x, added), whole)
        assert torch.equal(gated.swiglu(x, added), ps.swiglu(whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 7, 5), (40, 64, 66), (300, 576, 192), (13, 1100, 70), (0, 8, 8)], ids=str)
def test_what_is_added_to_has_the_bits_of_torchs_sum(sizes, dtype):
    x, weight, bias = tensors(*sizes, dtype)
    residual, *_ = tensors(sizes[0], 2 * sizes[2], 1, dtype)
    residual = residual[:, 1::2] if sizes[2] == 5 else residual[:, : sizes[2]]  # where it lies, if its rows are whole
    for packed in (PackedProduct(weight), *([PackedProduct(weight, gated=True)] if sizes[2] % 2 == 0 else [])):
        for added in (None, bias):
            assert torch.equal(packed.added_to(residual, x, added), residual + packed(x, added))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so_and_spoils_no_other_row(dtype):
    x, weight, _ = tensors(20, 40, 48, dtype)
    clean = PackedProduct(weight)(x)
    x[3, 5], x[9, 0] = torch.nan, torch.inf
    got = PackedProduct(weight)(x)
    assert got[3].isnan().all()
    assert got[9].isinf().all()
    others = [i for i in range(20) if i not in (3, 9)]
    assert torch.equal(got[others], clean[others])


@pytest.mark.usefixtures("compiles")
def test_a_compiled_graph_calls_it_by_name():
    x, weight, bias = tensors(9, 64, 32, torch.float32)
    product = PackedProduct(weight)
    compiled = torch.compile(lambda x: torch.relu(product(x, bias)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), torch.relu(product(x, bias)))
    gated = PackedProduct(weight, gated=True)
    assert torch.equal(torch.compile(gated.swiglu, backend="aot_eager", fullgraph=True)(x), gated.swiglu(x))
    residual = torch.ones(9, 32)
    added = torch.compile(product.added_to, backend="aot_eager", fullgraph=True)(residual, x)
    assert torch.equal(added, residual + product(x))


def library_of_another_processor(folder, monkeypatch):
    """With AVX-512 one without it; else the sixteen floats wide one, which the compiler makes of two registers."""
    source = folder / "product.cpp"
    if build.width() == 16:
        source.write_text(SOURCE.read_text())
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        source.write_text("#define POLYSHARD_WIDTH 16\n" + SOURCE.read_text())
    monkeypatch.setenv("POLYSHARD_CACHE", str(folder))
    assert build.unavailable(source) is None
    return build.library(source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_processor_gives_the_same_bits(dtype, tmp_path, monkeypatch):
    """One with another width of registers, and without a dot product of bfloat16 pairs."""
    other = library_of_another_processor(tmp_path, monkeypatch)
    columns = 48 - PackedProduct(torch.ones(1, 1)).packed.shape[2]
    assert other.polyshard_panel_columns() == columns
    kind = KINDS[dtype]
    assert other.polyshard_term_inputs(kind) == 1
    for inputs in (600, 37, 1100):  # of one part, of half a pair more, of two parts
        x, weight, bias = tensors(50, inputs, 70, dtype)
        packed, out = torch.empty(2 * -(-70 // columns), inputs, columns, dtype=dtype), torch.empty(50, 70, dtype=dtype)
        residual, *_ = tensors(50, 70, 1, dtype)
        at = [ctypes.c_void_p(t.data_ptr()) for t in (weight, packed, x, bias, out, residual)]
        stride, rows, wide = (ctypes.c_int64(n) for n in (inputs, 50, 70))
        for half in (0, 35):
            sizes = [ctypes.c_int64(n) for n in (inputs, 70, half)]
            other.polyshard_pack(kind, at[0], stride, at[1], *sizes, 1)
            for added in (None, at[5]):
                other.polyshard_product(kind, at[2], stride, at[1], at[3], added, wide, at[4], rows, *sizes, 0, 1)
                expected = PackedProduct(weight)(x, bias)
                assert torch.equal(out, residual + expected if added else expected)
        other.polyshard_product(kind, at[2], stride, at[1], at[3], None, wide, at[4], rows, *sizes, 1, 1)
        assert torch.equal(out.flatten()[: 50 * 35].view(50, 35), PackedProduct(weight, gated=True).swiglu(x, bias))


def test_a_dtype_that_it_does_not_have_is_named():
    assert "not torch.float64" in str(unsupported_reason(torch.float64))
