"""A small writer of vector code for this machine's CPU: the few loops of a decode step that torch has no kernel for.

LLVM compiles what is written here once, when a model is loaded (`kernels.py` says what); no compiler needs to be
installed. Vectors have 16 float32 lanes; bfloat16 is widened when it is loaded and rounded to nearest even when stored.
"""

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from llvmlite import binding, ir

LANES: Final = 16
F32: Final = ir.FloatType()
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
PTR: Final = ir.PointerType()
VEC: Final = ir.VectorType(F32, LANES)
_VEC32: Final = ir.VectorType(I32, LANES)
_VEC16: Final = ir.VectorType(I16, LANES)
_FAST: Final = ("reassoc", "contract", "nsz")
_CTYPES: Final = {PTR: ctypes.c_void_p, I64: ctypes.c_int64, F32: ctypes.c_float}


HOST: Final[str] = binding.get_host_cpu_name()
"""The CPU's kind by LLVM's name: `znver4`, `emeraldrapids`."""


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS: Final = ir.VectorType(_BFloat(), 2 * LANES)


class Writer:
    """One function under construction. `arguments` are its LLVM values in order."""

    def __init__(self, name: str, types: Sequence[ir.Type]) -> None:
        self._module = ir.Module(name)
        self._types = types
        self._function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), types), name)
        self._builder: Any = ir.IRBuilder(self._function.append_basic_block())
        self._entry = self._function.entry_basic_block
        self.arguments: Sequence[Any] = self._function.args

    # ---- whole numbers and loops ------------------------------------------------------------------------------------

    def whole(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def add(self, *terms: Any) -> Any:
        total = terms[0]
        for term in terms[1:]:
            total = self._builder.add(total, self.whole(term) if isinstance(term, int) else term)
        return total

    def times(self, left: Any, right: Any) -> Any:
        return self._builder.mul(left, self.whole(right) if isinstance(right, int) else right)

    def minus(self, left: Any, right: Any) -> Any:
        return self._builder.sub(left, right)

    def half(self, value: Any) -> Any:
        return self.part(value, 2)

    def part(self, value: Any, divisor: Any) -> Any:
        """value / divisor, rounded down, for numbers that are not negative."""
        return self._builder.udiv(value, self.whole(divisor) if isinstance(divisor, int) else divisor)

    def rest(self, value: Any, divisor: Any) -> Any:
        """What `part` leaves."""
        return self._builder.urem(value, self.whole(divisor) if isinstance(divisor, int) else divisor)

    def either(self, left: Any, relation: str, right: Any, then: Any, otherwise: Any) -> Any:
        return self._builder.select(self._builder.icmp_signed(relation, left, right), then, otherwise)

    def greater(self, left: Any, right: Any) -> Any:
        return self._builder.select(self._builder.icmp_signed(">", left, right), left, right)

    def lesser(self, left: Any, right: Any) -> Any:
        return self._builder.select(self._builder.icmp_signed("<", left, right), left, right)

    @contextmanager
    def loop(self, begin: Any, end: Any, step: int = 1) -> Iterator[Any]:
        """The body runs with each number from `begin` below `end`."""
        at = self.variable(begin)
        head, body, after = (self._function.append_basic_block() for _ in range(3))
        builder = self._builder
        builder.branch(head)
        builder.position_at_end(head)
        now = at.value
        builder.cbranch(builder.icmp_signed("<", now, end), body, after)
        builder.position_at_end(body)
        yield now
        at.value = builder.add(now, self.whole(step))
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def forever(self) -> Iterator[Callable[[Any, str, Any], None]]:
        """The body runs again and again, until what it is given is told of a relation that holds."""
        body, after = (self._function.append_basic_block() for _ in range(2))
        builder = self._builder
        builder.branch(body)
        builder.position_at_end(body)

        def leave(left: Any, relation: str, right: Any) -> None:
            on = self._function.append_basic_block()
            builder.cbranch(builder.icmp_signed(relation, left, right), after, on)
            builder.position_at_end(on)

        yield leave
        builder.branch(body)
        builder.position_at_end(after)

    @contextmanager
    def where(self, left: Any, relation: str, right: Any) -> Iterator[None]:
        with self._builder.if_then(self._builder.icmp_signed(relation, left, right)):
            yield

    def variable(self, value: Any) -> "Variable":
        with self._builder.goto_block(self._entry):
            place = self._builder.alloca(value.type)
        self._builder.store(value, place)
        return Variable(self._builder, place, value.type)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def place(self, base: Any, offset: Any, size: int) -> Any:
        """The address of element `offset`, of `size` bytes each."""
        return self._builder.gep(base, [self.times(offset, size)], source_etype=ir.IntType(8))

    def load(self, base: Any, offset: Any, dtype: torch.dtype) -> Any:
        """LANES elements as float32."""
        place = self.place(base, offset, dtype.itemsize)
        if dtype == torch.float32:
            return self._builder.load(place, typ=VEC, align=4)
        wide = self._builder.zext(self._builder.load(place, typ=_VEC16, align=2), _VEC32)
        return self._builder.bitcast(self._builder.shl(wide, self._lanes32(16)), VEC)

    def store(self, vector: Any, base: Any, offset: Any, dtype: torch.dtype) -> None:
        place = self.place(base, offset, dtype.itemsize)
        if dtype == torch.float32:
            self._builder.store(vector, place, align=4)
            return
        bits = self._builder.bitcast(vector, _VEC32)
        odd = self._builder.and_(self._builder.lshr(bits, self._lanes32(16)), self._lanes32(1))
        rounded = self._builder.add(self._builder.add(bits, self._lanes32(0x7FFF)), odd)
        self._builder.store(self._builder.trunc(self._builder.lshr(rounded, self._lanes32(16)), _VEC16), place, align=2)

    def prefetch(self, base: Any, offset: Any, count: int, dtype: torch.dtype) -> None:
        """Have `count` elements from there on fetched into the first cache; the address may be of nothing.

        At this very place: LLVM gathers its own prefetches at the beginning of a loop, and what is asked for all at
        once is dropped by the CPU.
        """
        place, typ = self.place(base, offset, dtype.itemsize), ir.FunctionType(ir.VoidType(), [PTR])
        for line in range(0, count * dtype.itemsize, 64):
            fetch = ir.InlineAsm(typ, f"prefetcht0 {line}($0)", "r,~{memory}", side_effect=True)
            self._builder.call(fetch, [place])

    def prefetch_from(self, address: Any, *, written: bool = False, second: bool = False) -> None:
        """Have the line at an address, a whole number, fetched into the first cache or the `second`.

        To be `written`, or read.
        """
        numbers = (ir.Constant(I32, number) for number in (int(written), 2 if second else 3, 1))
        self._call("llvm.prefetch.p0", ir.VoidType(), self._builder.inttoptr(address, PTR), *numbers)

    def copy(
        self, source: Any, at: Any, target: Any, to: Any, dtype: torch.dtype, *, past_caches: bool = False
    ) -> None:
        """LANES elements as they are. `past_caches`: to memory, as they are not read soon; `target` is then aligned."""
        typ = VEC if dtype == torch.float32 else _VEC16
        size = dtype.itemsize
        value = self._builder.load(self.place(source, at, size), typ=typ, align=size)
        stored = self._builder.store(value, self.place(target, to, size), align=LANES * size if past_caches else size)
        if past_caches:
            stored.set_metadata("nontemporal", self._module.add_metadata([ir.Constant(I32, 1)]))

    def load_int(self, base: Any, offset: Any) -> Any:
        return self._builder.load(self.place(base, offset, 8), typ=I64, align=8)

    def store_int(self, value: Any, base: Any, offset: Any) -> None:
        self._builder.store(value, self.place(base, offset, 8), align=8)

    def load_scalar(self, base: Any, offset: Any) -> Any:
        return self._builder.load(self.place(base, offset, 4), typ=F32, align=4)

    def store_scalar(self, value: Any, base: Any, offset: Any) -> None:
        self._builder.store(value, self.place(base, offset, 4), align=4)

    def splat_from(self, base: Any, offset: Any) -> Any:
        """One float32 in every lane."""
        return self.splat(self.load_scalar(base, offset))

    def load_pairs(self, base: Any, offset: Any) -> Any:
        """2 * LANES bfloat16, as `fma_pairs` takes them."""
        return self._builder.load(self.place(base, offset, 2), typ=_PAIRS, align=2)

    def load_both(self, base: Any, offset: Any) -> list[Any]:
        """2 * LANES bfloat16 as float32: those at even places, then those at odd ones."""
        words = self._builder.load(self.place(base, offset, 2), typ=_VEC32, align=2)
        even = self._builder.shl(words, self._lanes32(16))
        odd = self._builder.and_(words, self._lanes32(-0x10000))
        return [self._builder.bitcast(bits, VEC) for bits in (even, odd)]

    def splat_pair_from(self, base: Any, offset: Any) -> Any:
        """Two neighbouring bfloat16, again and again."""
        pair = self._builder.load(self.place(base, offset, 2), typ=I32, align=2)
        return self._builder.bitcast(self._splat(pair, _VEC32), _PAIRS)

    # ---- the CPU's matrix tiles, by number (AMX) --------------------------------------------------------------------

    def set_tiles(self, config: Any) -> None:
        """Give them the sizes that 64 bytes there say; all are zero then."""
        self._call("llvm.x86.ldtilecfg", ir.VoidType(), config)

    def release_tiles(self) -> None:
        self._call("llvm.x86.tilerelease", ir.VoidType())

    def clear_tile(self, number: int) -> None:
        self._call("llvm.x86.tilezero", ir.VoidType(), _tile(number))

    def load_tile(self, number: int, place: Any, stride: Any) -> None:
        """Its rows are `stride` bytes apart."""
        self._call("llvm.x86.tileloadd64", ir.VoidType(), _tile(number), place, stride)

    def store_tile(self, number: int, place: Any, stride: Any) -> None:
        self._call("llvm.x86.tilestored64", ir.VoidType(), _tile(number), place, stride)

    def multiply_tiles(self, sums: int, rows: int, columns: int) -> None:
        """Add products of bfloat16, whose inputs are in pairs, to sums of float32."""
        self._call("llvm.x86.tdpbf16ps", ir.VoidType(), _tile(sums), _tile(rows), _tile(columns))

    # ---- what threads share -----------------------------------------------------------------------------------------

    def told(self, base: Any, offset: Any) -> Any:
        """A word that other threads write: what they wrote before it is seen, too."""
        return self._builder.load_atomic(self.place(base, offset, 8), "seq_cst", 8, typ=I64)

    def raised(self, base: Any, offset: Any, by: Any) -> Any:
        """What a word was before so much was added to it, whatever other threads do meanwhile."""
        by = self.whole(by) if isinstance(by, int) else by
        return self._builder.atomic_rmw("add", self.place(base, offset, 8), by, "seq_cst")

    def swapped(self, base: Any, offset: Any, value: int) -> Any:
        """What a word was before it became `value`."""
        return self._builder.atomic_rmw("xchg", self.place(base, offset, 8), self.whole(value), "seq_cst")

    def pause(self) -> None:
        """Let a moment pass in a loop that waits for another thread."""
        self._call("llvm.x86.sse2.pause", ir.VoidType())

    def sleep_while(self, base: Any, offset: Any, value: Any) -> None:
        """Until `wake`, unless the word is another by now; may end earlier. Linux alone has it (futex)."""
        self._futex(self.place(base, offset, 8), 128, value)

    def wake(self, base: Any, offset: Any) -> None:
        """All threads that sleep on the word."""
        self._futex(self.place(base, offset, 8), 129, self.whole(0x7FFFFFFF))

    def _futex(self, place: Any, operation: int, value: Any) -> None:
        typ = ir.FunctionType(I64, [I64] * 5)
        registers = "={rax},{rax},{rdi},{rsi},{rdx},{r10},~{rcx},~{r11},~{memory}"
        system = ir.InlineAsm(typ, "syscall", registers, side_effect=True)
        given = self.whole(202), self.address(place), self.whole(operation), value, self.whole(0)
        self._builder.call(system, given)

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def number(self, value: float) -> Any:
        return ir.Constant(VEC, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        return self._splat(scalar, VEC)

    def plus(self, left: Any, right: Any) -> Any:
        return self._builder.fadd(left, right)

    def less(self, left: Any, right: Any) -> Any:
        return self._builder.fsub(left, right)

    def by(self, left: Any, right: Any) -> Any:
        return self._builder.fmul(left, right)

    def over(self, left: Any, right: Any) -> Any:
        return self._builder.fdiv(left, right)

    def fma(self, left: Any, right: Any, term: Any) -> Any:
        return self._call("llvm.fma.v16f32", VEC, left, right, term)

    def fma_pairs(self, left: Any, right: Any, term: Any) -> Any:
        """term + the sums of products of neighbouring bfloat16; on CPUs that have it."""
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", VEC, term, left, right)

    def largest(self, left: Any, right: Any) -> Any:
        return self._call("llvm.maxnum.v16f32", VEC, left, right)

    def sum(self, vector: Any) -> Any:
        """The lanes' sum, a scalar."""
        zero = ir.Constant(F32, -0.0)
        return self._call("llvm.vector.reduce.fadd.v16f32", F32, zero, vector, fast=("reassoc",))

    def halved(self, left: Any, right: Any, width: int) -> Any:
        """Sums of neighbouring groups of `width` lanes: of each pair of groups the left vector's, then the right's."""
        pairs = [(begin, half) for begin in range(0, LANES, 2 * width) for half in (0, LANES)]
        lanes = [begin + half + lane for begin, half in pairs for lane in range(width)]
        return self.plus(self.picked(left, right, lanes), self.picked(left, right, [lane + width for lane in lanes]))

    def picked(self, left: Any, right: Any, lanes: Sequence[int]) -> Any:
        """The lanes that are named, those of `right` from LANES on."""
        return self._builder.shuffle_vector(left, right, ir.Constant(_VEC32, list(lanes)))

    def top(self, vector: Any) -> Any:
        return self._call("llvm.vector.reduce.fmax.v16f32", F32, vector, fast=("nnan", "nsz"))

    def first_zero(self, vector: Any, otherwise: int) -> Any:
        """The first lane that is zero, a whole number."""
        b = self._builder
        mask = b.bitcast(b.fcmp_ordered("==", vector, self.number(0.0)), I16)
        lane = b.zext(b.cttz(mask, ir.Constant(ir.IntType(1), 0)), I64)
        return b.select(b.icmp_signed("==", mask, ir.Constant(I16, 0)), self.whole(otherwise), lane)

    def sqrt(self, vector: Any) -> Any:
        return self._call("llvm.sqrt.v16f32", VEC, vector)

    def exp(self, x: Any) -> Any:
        """e to the x, within 2 units in the last place, for x clamped to what float32 holds (Cephes' polynomial)."""
        b = self._builder
        x = self._call("llvm.minnum.v16f32", VEC, self.largest(x, self.number(-87.0)), self.number(88.0))
        whole = self._call("llvm.floor.v16f32", VEC, self.fma(x, self.number(1.44269504088896341), self.number(0.5)))
        rest = self.fma(whole, self.number(-0.693359375), x)
        rest = self.fma(whole, self.number(2.12194440e-4), rest)
        power = self.number(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            power = self.fma(power, rest, self.number(term))
        power = self.plus(self.fma(power, self.by(rest, rest), rest), self.number(1.0))
        exponent = b.shl(b.add(b.fptosi(whole, _VEC32), self._lanes32(127)), self._lanes32(23))
        return self.by(power, b.bitcast(exponent, VEC))

    def _splat(self, scalar: Any, typ: Any) -> Any:
        one = self._builder.insert_element(ir.Constant(typ, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self._builder.shuffle_vector(one, ir.Constant(typ, ir.Undefined), ir.Constant(_VEC32, [0] * LANES))

    def _lanes32(self, value: int) -> Any:
        return ir.Constant(_VEC32, [value] * LANES)

    def _call(self, name: str, result: Any, *values: Any, fast: Sequence[str] = ()) -> Any:
        function = self._module.globals.get(name) or ir.Function(
            self._module, ir.FunctionType(result, [value.type for value in values]), name
        )
        return self._builder.call(function, values, fastmath=fast)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def call(self, kernel: "Kernel", *values: Any) -> None:
        """Run another kernel; addresses may be given as whole numbers."""
        self.call_at(self.whole(kernel.address), kernel.types, *values)

    def call_at(self, place: Any, types: Sequence[ir.Type], *values: Any) -> None:
        """Run the kernel at an address."""
        function = self._builder.inttoptr(place, ir.FunctionType(ir.VoidType(), types).as_pointer())
        self._builder.call(function, [self._given(value, to) for value, to in zip(values, types, strict=True)])

    def address(self, place: Any) -> Any:
        """A pointer as a whole number."""
        return self._builder.ptrtoint(place, I64)

    def pointer(self, address: Any) -> Any:
        return self._builder.inttoptr(address, PTR)

    def _given(self, value: Any, typ: ir.Type) -> Any:
        if isinstance(value, int | float):
            value = ir.Constant(F32 if typ is F32 else I64, value)
        is_number = isinstance(typ, ir.PointerType) and not isinstance(value.type, ir.PointerType)
        return self._builder.inttoptr(value, PTR) if is_number else value

    def compiled(self) -> "Kernel":
        self._builder.ret_void()
        return Kernel(_compile(str(self._module), self._function.name), self._types)


def _tile(number: int) -> Any:
    return ir.Constant(ir.IntType(8), number)


def address(words: "array[int] | array[float]") -> int:
    """The address of an array's first element; good for as long as somebody keeps the array."""
    return words.buffer_info()[0]


class Kernel:
    """A compiled function of addresses, whole numbers and floats; it holds no lock of Python's."""

    def __init__(self, address: int, types: Sequence[ir.Type]) -> None:
        self.address = address
        self.types = types
        self._function = ctypes.CFUNCTYPE(None, *[_CTYPES[typ] for typ in types])(address)

    def __call__(self, *values: int | float | None) -> None:
        self._function(*values)


_SUMMED: Final = [int(f"{lane:04b}"[::-1], 2) for lane in range(LANES)]
"""The lanes in which `Sums` finds the sums of what it was given one after the other."""


class Sums:
    """The sums of the lanes of LANES vectors, each in its own lane: a tree, of which few vectors are held at a time."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._held: list[tuple[int, Any]] = []

    def add(self, vector: Any) -> None:
        width = LANES // 2
        while self._held and self._held[-1][0] == width:
            vector = self._writer.halved(self._held.pop()[1], vector, width)
            width //= 2
        self._held.append((width, vector))

    @property
    def all(self) -> Any:
        """When all have been added."""
        ((_, vector),) = self._held
        return self._writer.picked(vector, vector, _SUMMED)


class Variable:
    """A value that changes; LLVM keeps it in a register."""

    def __init__(self, builder: Any, place: Any, typ: Any) -> None:
        self._builder = builder
        self._place = place
        self._type = typ

    @property
    def value(self) -> Any:
        return self._builder.load(self._place, typ=self._type)

    @value.setter
    def value(self, new: Any) -> None:
        self._builder.store(new, self._place)


_engines: list[Any] = []
"""What was compiled lives as long as the process."""


def _compile(text: str, name: str) -> int:
    """Where the function begins."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=HOST, features=binding.get_host_cpu_features().flatten(), opt=3
    )
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address
