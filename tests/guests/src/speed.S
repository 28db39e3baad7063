# Loops of a known number of instructions, for benchmarks/mips.py: each says its name
# and that number, runs, and says "done".
#include "serial.inc"

	.set COUNT, 50000000
	.set SHORT, 10000000

main:
	say "alu 300000000\n"
	mov $COUNT, %ecx
	xor %eax, %eax
	mov $0x9e3779b9, %ebx
1:	add %ebx, %eax
	xor %ecx, %eax
	rol $5, %eax
	lea (%eax,%eax,2), %edx
	dec %ecx
	jnz 1b
	say "done\n"

	say "memory 300000000\n"
	mov $COUNT, %ecx
1:	mov %ecx, %eax
	and $0xffc, %eax
	add %ecx, buffer(%eax)
	mov buffer(%eax), %ebx
	dec %ecx
	jnz 1b
	say "done\n"

	say "calls 100000000\n"
	mov $SHORT, %ecx
1:	call leaf
	push %eax
	pop %edx
	cmp %eax, %edx
	jne 2f
	dec %ecx
	jnz 1b
2:	say "done\n"

	say "strings 64000000 bytes\n"
	mov $64, %ebp
	cld
1:	mov $buffer, %esi
	mov $buffer + 1000000, %edi
	mov $250000, %ecx
	rep movsl
	dec %ebp
	jnz 1b
	say "done\n"

	mov $0xcf9, %dx
	mov $0x06, %al
	out %al, %dx
	cli
	hlt

leaf:	# three instructions, ret included
	mov %ecx, %eax
	not %eax
	ret

	.bss
	.balign 4096
buffer:	.skip 2000000
