# ACPI soft off through bhyve's PM1 control register: SLP_TYP 5 with SLP_EN
# (ACPI 6.5, 4.8.3.2.1).
#include "serial.inc"
main:
	say "powering off\n"
	mov $0x404, %dx
	mov $0x3400, %ax
	out %ax, %dx
1:	hlt
	jmp 1b
