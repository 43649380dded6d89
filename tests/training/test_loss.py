"""The loss against PyTorch's cross entropy, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.models.decoder import Decoder
from storm_jax.training import loss as loss_module
from storm_jax.training.loss import loss_sums
from tests.tiny import run_config

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def case():
    from flax import nnx

    config = run_config().model.decoder
    decoder = Decoder(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 20, config.width)).astype(np.float32)
    targets = rng.integers(0, config.vocab_size, (3, 20)).astype(np.int32)
    targets[rng.random((3, 20)) < 0.6] = -1
    return decoder, hidden, targets


@pytest.mark.parametrize("chunk", (512, 7))
def test_sums_and_gradients_equal_torch(case, chunk, monkeypatch):
    decoder, hidden, targets = case
    monkeypatch.setattr(loss_module, "CHUNK", chunk)

    def total(x):
        sums = loss_sums(decoder, x, jnp.asarray(targets))
        return sums.nll + 0.1 * sums.z, sums

    (value, sums), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(hidden))

    x = torch.tensor(hidden, requires_grad=True)
    table = torch.tensor(np.array(decoder.embedding.table[...]))
    scores = x @ table.T
    there = torch.tensor(targets >= 0)
    wanted = torch.tensor(targets).long()[there]
    nll = torch.nn.functional.cross_entropy(scores[there], wanted, reduction="sum")
    z = (torch.logsumexp(scores[there], -1) ** 2).sum()
    (nll + 0.1 * z).backward()
    right = (scores[there].argmax(-1) == wanted).sum()
    np.testing.assert_allclose(value, (nll + 0.1 * z).item(), rtol=1e-5)
    np.testing.assert_allclose(sums.nll, nll.item(), rtol=1e-5)
    np.testing.assert_allclose(sums.z, z.item(), rtol=1e-5)
    assert sums.correct == right.item() and sums.tokens == (targets >= 0).sum()
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=2e-5)


def test_no_targets_give_zero(case):
    decoder, hidden, targets = case
    sums = loss_sums(decoder, jnp.asarray(hidden), jnp.full_like(targets, -1))
    assert (sums.nll, sums.z, sums.correct, sums.tokens) == (0, 0, 0, 0)
