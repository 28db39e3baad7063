# The PCI reset control register: full reset (PIIX4 datasheet, 4.1.3 RC).
#include "serial.inc"
main:
	say "resetting\n"
	mov $0xcf9, %dx
	mov $0x02, %al
	out %al, %dx
	mov $0x06, %al
	out %al, %dx
1:	hlt
	jmp 1b
