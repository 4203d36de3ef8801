"""One budget of connections over several processes.

Three parts, which meet in small interfaces only:

* a *store* (:mod:`.store`): rows of text under an exclusive lock, signs of life, bells
  between the processes, and what they say of themselves to onlookers;
* the *book* (:mod:`.book`, :mod:`.allocation`): what the rows mean and which member
  may change what. Pure: no I/O, no clock, no thread;
* the *keeper* (:mod:`.keeper`): one background thread in each process, with the store
  and the book on one side and the pool, as a :class:`.demand.Local`, on the other.

The rest of this is the protocol. A transaction either happens or does not. **A slot**
is the right to have one connection open. Of the N slots each is *free*: counted in no
row; *owned*: counted in the row of one member; or *quarantined*, in a row
``gone/<number>``: no member answers for it, but a server session may still be open.
**A session** is what a connection is at the server: a process there and when it began.
A member writes each into its row before the connection is used, and takes it out after
the session has ended. A slot of a member that is gone may be *unposted*: held by a
session that was opened a moment before, or by none.

============================  ==========================================================
transition                    by which member, and when
============================  ==========================================================
free -> owned                 `settle`: a member, for itself, up to its target, before
                              it opens a connection; `tell`: any, for another one that
                              is below its target: such a slot is *granted*
owned -> free                 `settle`, `leave`: the owner, for itself, after the
                              connection is closed and its pool told not to open
                              another; `reap`, `stall`: any, those that are granted
owned -> quarantined          `reap`: any, when the kernel or the server says that
                              the owner's sign of life is gone and its row has not
                              changed since before that was asked;
                              `leave`: the owner, for connections that stay open;
                              `quarantine`: the owner, for a single connection of which
                              it cannot know if its session has ended
quarantined -> free           `release`: any, session by session, when the server
                              says that it is gone (or, where it cannot be asked, after
                              a stated time); an unposted slot when there is no session
                              that could have it, see :mod:`.watch`
quarantined -> owned          `join`: the owner itself, that was taken for dead
anything -> free              `reset`: an operator, while no member lives
============================  ==========================================================

So a member never has more connections open than slots are kept for it, whenever it
stops: the number that its pool may open is raised *after* the row, and lowered *before*
it. A commit of which the answer was lost does no harm: what counts is the row, which is
read at the next look. A member that only stops (SIGSTOP) keeps its sign of life, so its
slots. Others may write into its row that it is `stalled`: then its demand counts no
more. A forked child is another process, and owns nothing.

A sign of life can be *lost* while its process lives, where it depends on a connection.
So a pool uses a new connection only after its keeper has said that the session is in
the row, and that the row covers all that is open. And a keeper lets its pool open
nothing from before it makes a new sign until it has seen its row: it takes its
quarantine back, or takes free slots for what is open, before anything else.

The rows can be lost, too: the file is deleted, the tables are dropped. Rows that are
made anew are `fresh`: they hand out no slot while there is a sign of life that belongs
to no member. That is one of the rows before, which finds out, and joins with what it
has open. If the rows are *older* than what a member knows (a copy was restored), it
takes free slots for what it has open, and opens nothing while it has fewer.

Each transaction computes the allocation for all members, and grants what is free. A
granted slot is in the row of the member, which uses it when it has written the row
itself; so others may take it back before, by a row that the member has not read. And it
writes down, in the row ``due``, which members are expected to look, and why: ``give``,
the target is below what it owns; ``limit``, a ceiling that binds it has changed;
``turn``, it is asked to yield its place in a line; ``press``, others go short, so what
it does not use has to be given up at once. Those whose entry is new are rung, and those
that were granted something. A bell may be lost: the row is not.

A transaction of a member that is far away keeps all others waiting for the time of a
message and its answer. So a member reads the rows without the lock first, and does to a
copy what it would do in the transaction. If only its own row comes out as another one,
and with as many slots, that row is written in one message, provided that it stands
there as it was read.

All members have the same terms, and their connections go to one server. A newcomer with
others is refused unless no other member lives; then its own are in force. So are
members of a later version by those of an earlier one.
"""
