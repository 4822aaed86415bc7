"""Models side by side in one: each is a model by itself, and their mean score counts."""

import pytest
import torch
import torch.nn.functional as F

from recgpt.config import LossSettings, ModelSettings, UserSettings
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.model.item_table import ItemTable
from recgpt.model.members import MemberLinear, weights_as_one

MEMBERS, WIDTH, NUM_ITEMS = 3, 8, 20
ITEMS = torch.randint(1, NUM_ITEMS + 1, (9,), generator=torch.Generator().manual_seed(1))
TARGETS = ITEMS.roll(1)
LAYOUT, USERS = Layout.from_offsets(torch.tensor([0, 3, 4, 9])), torch.tensor([1, 0, 3])
COUNTS = torch.arange(NUM_ITEMS + 1)


def parts(similarity, loss, members, combine="add"):
    """A GPT and an item table, with weights large enough to matter, in float64."""
    torch.manual_seed(0)
    user = UserSettings(kind="hashed", buckets=5, combine=combine)
    settings = ModelSettings(width=WIDTH, layers=2, members=members, similarity=similarity, user=user)
    table = ItemTable(
        NUM_ITEMS, settings.vector_width, 0, loss, COUNTS, similarity == "cosine", members
    ).double()
    table.weight.data *= 30
    gpt = GPT(settings).double().eval()
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.3)
    return gpt, table


def share(name, weight, member):
    """What of a weight belongs to a member: rows of layers and biases, columns of vectors."""
    is_layer = weight.dim() == 1 or any(part in name for part in ("attention.", "feed_forward.", "user_gate"))
    return weight.chunk(MEMBERS, 0 if is_layer else 1)[member]


def alone(gpt, table, similarity, loss, combine, member):
    """A model of its own with the weights of a member."""
    own_gpt, own_table = parts(similarity, loss, 1, combine)
    weights = gpt.state_dict().items()
    own_gpt.load_state_dict({name: share(name, weight, member) for name, weight in weights})
    own_table.weight.data = table.weight.data.chunk(MEMBERS, 1)[member].clone()
    return own_gpt, own_table


@pytest.mark.parametrize(("similarity", "combine"), [("cosine", "add"), ("dot", "gate")])
@pytest.mark.parametrize("kind", ["full", "sampled", "binary"])
def test_each_member_is_a_model_of_its_own(similarity, combine, kind):
    loss = LossSettings(kind=kind, block_items=7, negatives=6)
    gpt, table = parts(similarity, loss, MEMBERS, combine)
    interest = gpt(table(ITEMS), LAYOUT, USERS)
    torch.manual_seed(5)
    together = table.loss_sum(interest, TARGETS)
    scores, losses = [], []
    for member in range(MEMBERS):
        own_gpt, own_table = alone(gpt, table, similarity, loss, combine, member)
        own_interest = own_gpt(own_table(ITEMS), LAYOUT, USERS)
        scores.append(own_interest @ own_table.vectors().T)
        torch.manual_seed(5)  # the same draws for all
        losses.append(own_table.loss_sum(own_interest, TARGETS))
    torch.testing.assert_close(interest @ table.vectors().T, torch.stack(scores).mean(0))
    torch.testing.assert_close(together, torch.stack(losses).mean())


def test_a_member_learns_from_its_own_loss_alone():
    loss = LossSettings(kind="full")
    gpt, table = parts("cosine", loss, MEMBERS)
    own_gpt, own_table = alone(gpt, table, "cosine", loss, "add", 1)
    table.loss_sum(gpt(table(ITEMS), LAYOUT, USERS), TARGETS).backward()
    own_table.loss_sum(own_gpt(own_table(ITEMS), LAYOUT, USERS), TARGETS).backward()
    expected = dict(own_gpt.named_parameters())
    for name, weight in gpt.named_parameters():
        torch.testing.assert_close(MEMBERS * share(name, weight.grad, 1), expected[name].grad)
    torch.testing.assert_close(MEMBERS * table.weight.grad.chunk(MEMBERS, 1)[1], own_table.weight.grad)


def test_a_layer_of_members_as_one_ordinary_layer():
    whole = MEMBERS * WIDTH
    layer = MemberLinear(2 * whole, 3 * whole, MEMBERS, parts_in=2, parts_out=3).double()
    x_2TD = torch.randn(2, 5, whole, dtype=torch.float64)
    of_members = x_2TD.chunk(MEMBERS, 2)
    found = layer(torch.cat([part for share_2TS in of_members for part in share_2TS], 1))
    expected = [part for member in found.chunk(MEMBERS, 1) for part in member.chunk(3, 1)]
    weight, bias = layer.as_one()
    as_one = F.linear(torch.cat([*x_2TD], 1), weight, bias).chunk(3 * MEMBERS, 1)
    for member in range(MEMBERS):
        for part in range(3):
            torch.testing.assert_close(as_one[MEMBERS * part + member], expected[3 * member + part])


def test_without_members_weights_are_what_they_are():
    gpt, _ = parts("dot", LossSettings(), 1, "gate")
    torch.testing.assert_close(weights_as_one(gpt), dict(gpt.state_dict()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("similarity", "combine"), [("cosine", "add"), ("dot", "gate")])
def test_on_cuda_loss_and_gradients_are_those_of_the_cpu(similarity, combine):
    outcomes = []
    for device in ("cpu", "cuda"):
        gpt, table = (
            part.to(device) for part in parts(similarity, LossSettings(kind="full"), MEMBERS, combine)
        )
        layout = Layout.from_offsets(torch.tensor([0, 3, 4, 9], device=device))
        interest = gpt(table(ITEMS.to(device)), layout, USERS.to(device))
        loss = table.loss_sum(interest, TARGETS.to(device))
        loss.backward()
        gradients = [weight.grad for weight in (*gpt.parameters(), *table.parameters())]
        outcomes.append([tensor.cpu() for tensor in (loss.detach(), *gradients)])
    torch.testing.assert_close(*outcomes)
