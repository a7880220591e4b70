"""``--card``: every test as on another card, by its kernels' configs."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--card", help="kernels are launched as for this card, sm_86; as if it had 46 processors, sm_90:46"
    )


@pytest.fixture(autouse=True, scope="session")
def _card(request):
    wanted = request.config.getoption("--card")
    if wanted is None:
        yield
        return
    from dorac.kernels.target import CARDS
    from dorac.ops import cards

    name, _, processors = wanted.partition(":")
    card = CARDS[name]
    with cards.launched_for(card._replace(processors=int(processors)) if processors else card):
        yield
