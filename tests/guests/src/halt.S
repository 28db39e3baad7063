# The only processor stops with interrupts off: nothing can wake it again.
#include "serial.inc"
main:
	say "halting\n"
	cli
1:	hlt
	jmp 1b
