"""One budget of connections over several processes.

Three parts, which meet in small interfaces only:

* a *store* (:mod:`.store`): rows of text under an exclusive lock, signs of life, bells
  between the processes, and what they say of themselves to onlookers;
* the *book* (:mod:`.book`, :mod:`.allocation`): what the rows mean and which member
  may change what. Pure: no I/O, no clock, no thread;
* the *keeper* (:mod:`.keeper`): one background thread in each process, with the store
  and the book on one side and the pool on the other.

None of them knows the pool: it calls :meth:`.keeper.Keeper.ring`, and is called as a
:class:`.demand.Local`. The rest of this is the protocol. A transaction either happens
or does not.

**A slot** is the right to have one connection open. Of the N slots each is

=============  =======================================================================
free           counted in no row: N less all the others
owned          counted in the row of one member, `owned`
quarantined    counted in a row ``gone/<number>``: no member answers for it, but a
               server session may still be open
=============  =======================================================================

**A session** is what a connection is at the server: a process there and when it began.
A member writes each into its row before the connection is used, and takes it out after
the session has ended. So a slot of a member that is gone is held by a session that is
known, or *unposted*: by one that was opened a moment before, or by none.

============================  ==========================================================
transition                    by which member, and when
============================  ==========================================================
free -> owned                 `settle`: a member, for itself, up to its target, before
                              it opens a connection
owned -> free                 `settle`, `leave`: the owner, for itself, after the
                              connection is closed and its pool told not to open another
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
it. If a member is gone for good

* before its transaction is committed, or in it: nothing of it has happened;
* after it took slots, or told its pool to shrink: all its slots are reaped;
* after it gave back, before it rang the member that waits for that: that one looks on
  its beat, finds itself in the row ``due``, and takes;
* between `reap` and `release`: the quarantine is in the rows, any member goes on;
* after a connection was opened, before its session was posted: its slot is unposted.

A member that only *stops* (SIGSTOP, a debugger, a suspended machine) keeps its sign of
life, so its slots; it goes on from where it stood. Others may write into its row that
it is `stalled`: then its demand counts no more, and nothing else changes. A forked
child is another process with an id of its own, and owns nothing. A commit of which the
answer was lost does no harm: what counts is the row, which is read at the next look.

A sign of life can be *lost* while its process lives, where it depends on a connection.
Then the slots of a living member go into quarantine, and are free once the server knows
no session of it. So a pool uses a new connection only after its keeper has said that
the session is in the row, and that the row covers all that is open. And a keeper lets
its pool open nothing from before it makes a new sign until it has seen its row: it
takes its quarantine back, or takes free slots for what is open, before anything else.

The rows can be *lost* while members live: the file is deleted, the tables are dropped.
Rows that are made anew are `fresh`: they hand out no slot while there is a sign of life
that belongs to no member. That is one of the rows before, whose connections are open;
it finds out, joins, and takes slots for what it has open. The rows can be *older* than
what a member knows, if a copy was restored. Then it takes free slots for what it has
open, and opens nothing while it has fewer.

**Which members are told.** Each transaction computes the allocation for all members
(:mod:`.allocation`) and writes down, in the row ``due``, which of them are expected to
look, and why: ``give``, the target is below what it owns; ``take``, there are free
slots for it; ``limit``, a ceiling that binds it has changed; ``turn``, it is asked to
yield its place in a line; ``press``, others go short, so what it does not use has to be
given up at once. Those whose entry is new are rung. A bell may be lost: the row is not.

**Terms.** All members have the same numbers, and their connections go to one server. A
newcomer with other terms, or another server, is refused unless no other member lives;
then its own are in force. So are members of a later version by those of an earlier one.
"""
