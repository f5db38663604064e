"""The state is one position behind the token, and both are needed.

When the head drafts behind the newest token, no layer has run that token: exit 8's last state is
that of the position before. It knows what came earlier, and which token was likely to come, not
which one came. The token alone knows the word and nothing of what it stands in. A head that was
given the newest token's own state has learnt to copy it, which is of no use where it is not there.

At the second draft even the state before is missing. The head's own output stands in for it, which
it has never seen when the matrix was found: `train_exits.py --draft-head` trains it on that too.
"""

import torch.nn.functional as F


def before(h):
    return F.pad(h[:, :-1], (0, 0, 1, 0))


def look(state, token, looks):
    return state * (looks != "token"), token * (looks != "state")
