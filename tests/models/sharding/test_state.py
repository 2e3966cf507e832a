"""What a resume puts where, how much of the files it reads, and in which precision gradients add up."""

import copy
import os

import pytest
import torch

from ppo_vs_dpo.models.sharding import state
from ppo_vs_dpo.models.sharding.collectives import gradients_in_buckets
from ppo_vs_dpo.models.sharding.state import empty_state, load_trained, save_trained
from tests.ranks import on_ranks, settings_of


@pytest.mark.parametrize("flag", ["fused", "capturable", None])
def test_the_step_is_where_the_optimizer_reads_it(flag):
    """A fused step on a device reads its number there; one on the host would be an illegal access."""
    partition = torch.empty(7, device="meta")
    index = {"moments": ["exp_avg", "exp_avg_sq"], "scalars": {"step": 3.0}}
    made = empty_state({flag: True} if flag else {"fused": None}, partition, index)
    assert made["step"].device.type == ("meta" if flag else "cpu")
    assert made["step"].dtype == torch.float32
    assert {made[key].device.type for key in index["moments"]} == {"meta"}
    if flag is None:
        assert made["step"] == 3


class Counted:
    """A safetensors file that counts the numbers it gives out."""

    given = 0

    def __init__(self, file):
        self.file = file

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        Counted.given += tensor.numel()
        return tensor

    def get_slice(self, name):
        whole = self.file.get_slice(name)

        class Slice:
            def __getitem__(self, rows):
                tensor = whole[rows]
                Counted.given += tensor.numel()
                return tensor

        return Slice()


def trained_engine(seed: int, stage: str):
    import deepspeed

    torch.manual_seed(seed)
    # 30 x 7: no piece of a rank begins at a row; a bias; a layer smaller than the number of ranks.
    model = torch.nn.Sequential(torch.nn.Linear(7, 30), torch.nn.Linear(30, 64), torch.nn.Linear(64, 1))
    settings = settings_of(stage) | {"train_batch_size": int(os.environ["WORLD_SIZE"])}
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    settings |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)
    return engine


def step(engine):
    torch.manual_seed(9)
    engine.backward(engine(torch.randn(4, 7)).pow(2).mean())
    engine.step()


def weights(engine):
    from ppo_vs_dpo.models.sharding.deepspeed import whole_state

    return {name: value.clone() for name, value in whole_state(engine.module, keep=True).items()}


def save_and_go_on(folder, stage):
    rank = int(os.environ["RANK"])
    engine = trained_engine(0, stage)
    step(engine)
    # A rank writes what it holds whenever that is so much.
    state.PART = 4000
    save_trained(engine, folder, rank, int(os.environ["WORLD_SIZE"]))
    torch.distributed.barrier()
    step(engine)
    other = trained_engine(1, stage)
    opened = state.safe_open
    state.safe_open = lambda *args: Counted(opened(*args))
    load_trained(other, folder)
    step(other)
    numbers = 3 * sum(tensor.numel() for tensor in weights(engine).values())
    same = all(torch.equal(a, b) for a, b in zip(weights(engine).values(), weights(other).values(), strict=True))
    return Counted.given, numbers, same


RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@RANKS
def test_each_rank_reads_its_own_piece(tmp_path, ranks):
    """ZeRO-3: the file is read about once by all ranks together (rows that two pieces share, twice); exactly."""
    found = on_ranks(ranks, save_and_go_on, tmp_path, "zero3")
    assert len(list(tmp_path.glob("trained-*.safetensors"))) > 2
    numbers = found[0][1]
    # A row of these matrices is up to a thirtieth of them.
    assert sum(given for given, _, _ in found) <= (1 + 0.05 * (ranks - 1)) * numbers
    assert all(same for *_, same in found)


@RANKS
def test_under_zero2_all_ranks_together_read_it_once(tmp_path, ranks):
    """What every rank needs whole is read by one of them, in turn, and sent to the others."""
    found = on_ranks(ranks, save_and_go_on, tmp_path, "zero2")
    assert sum(given for given, _, _ in found) == found[0][1]
    assert all(given > 0 for given, _, _ in found)
    assert all(same for *_, same in found)


def summed_gradient(stage: str, micro_batches: int) -> float:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    settings = copy.deepcopy(settings_of(stage))
    settings |= {"train_batch_size": micro_batches, "train_micro_batch_size_per_gpu": 1}
    settings |= {"gradient_accumulation_steps": micro_batches, "gradient_clipping": 1e9}
    settings |= {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-9)
    )
    shape = (micro_batches, 4, 64)
    inputs = (torch.randn(shape) * 0.2 + torch.randn(64) * 0.3).bfloat16()
    factors = (torch.randn(shape) * 0.2 + torch.randn(64) * 0.3).bfloat16()
    for number in range(micro_batches):
        engine.set_gradient_accumulation_boundary(number == micro_batches - 1)
        loss = (engine(inputs[number]) * factors[number]).sum() / micro_batches
        engine.backward(loss, scale_wrt_gas=False)
    found = safe_get_full_grad(next(engine.module.parameters())).float()
    true = torch.einsum("nbo,nbi->oi", factors.float(), inputs.float()) / micro_batches
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_gradients_add_up_in_fp32(stage):
    """128 micro-batches in bfloat16: each rounds its own gradient, and the sum does not round again."""
    (error,) = on_ranks(1, summed_gradient, stage, 128)
    # 1.6 % where the sum itself is in bfloat16.
    assert error < 2e-3


def one_step_of_ddp() -> tuple[int, int]:
    """How many gradients there are and in how many pieces of memory; they and weights are equal on both ranks."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # An earlier test's, of one process, came with the fork.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs()])
    gradients_in_buckets(accelerator)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inputs = torch.randn(2, 3, 6)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(inputs[accelerator.process_index]).pow(2).mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    for value in (*grads, *model.parameters()):
        both = accelerator.gather(value.detach()[None])
        assert torch.equal(both[0], both[1])
    pieces = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    return len(grads), len(pieces)


def test_ddps_gradients_are_its_buckets():
    """One copy of them: without it 4 bytes a trained weight more on each GPU."""
    assert on_ranks(2, one_step_of_ddp) == [(8, 1)] * 2
