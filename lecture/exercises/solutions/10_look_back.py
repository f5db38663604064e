"""The state is one position behind the token, and both are needed.

When the head drafts after the newest token, no layer has run that token yet, so exit 8's last state
is from the position before. This state knows what came earlier and which token was likely to come,
but not which one came. The token alone knows the word, but nothing of its context. A head that was
given the newest token's own state has learnt to copy it, which is useless where there is no such
state.

At the second draft even the state before is missing, and the head's own output replaces it. The
head never saw its own output when the matrix was fitted; `train_exits.py --draft-head` trains it on
that too.
"""

import torch.nn.functional as F


def before(h):
    return F.pad(h[:, :-1], (0, 0, 1, 0))


def look(state, token, looks):
    return state * (looks != "token"), token * (looks != "state")
