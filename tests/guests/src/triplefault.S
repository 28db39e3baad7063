# No handler for an exception, nor for the one that follows, nor for the third.
#include "serial.inc"
main:
	say "faulting\n"
	lidt no_idt
	ud2
no_idt:	.word 0
	.long 0
