"""One budget of connections over several processes.

Three parts, which meet in small interfaces only:

* a *store* (:mod:`.store`): rows of text under an exclusive lock, signs of life, bells
  between the processes, and what they say of themselves to onlookers;
* the *book* (:mod:`.book`, :mod:`.allocation`): what the rows mean and who may change
  what. Pure: no I/O, no clock, no thread. The protocol is written at its head;
* the *keeper* (:mod:`.keeper`): one background thread in each process, with the store
  and the book on one side and the pool on the other.

None of them knows the pool: it calls :meth:`.keeper.Keeper.ring`, and is called as a
:class:`.keeper.Local`.
"""
