# Waits for interrupts that do not come.
#include "serial.inc"
main:
	say "idle\n"
	# With interrupts on, a stopped processor is not the end of the machine.
	sti
1:	hlt
	jmp 1b
